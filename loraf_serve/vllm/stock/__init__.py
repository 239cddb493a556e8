"""LoRAF checkpoints in a stock `vllm serve`.

install       what the plugin changes in that server, and when
checkpoints   which checkpoint and set a path or a name means; verified, or refused
models        task sets as model names
worker        task sets beside PEFT adapters, in vLLM's workers
"""
