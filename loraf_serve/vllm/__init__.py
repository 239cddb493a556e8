"""Everything that is particular to vLLM: the only place that imports it."""
