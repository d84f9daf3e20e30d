"""A run: the plan, the coordinator that walks it, the pools of workers, and what a person sees meanwhile."""
