"""What runs on a schedule or builds the demo: the nightly job, the demo fleet's recipe, cluster specs."""
