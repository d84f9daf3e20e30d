"""Scoring: suites, vLLM replicas, judges, rates and gates. Nothing is re-exported, so that planning stays light."""
