"""What everything else stands on: errors, identity, addresses. Imports nothing of ours."""
