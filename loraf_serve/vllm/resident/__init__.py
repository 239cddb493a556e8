"""The resident backend inside vLLM's workers: one adapter serves every task set.

Each worker holds a checkpoint's A and B once, as one operand of `loraf_serve.kernels` for each of vLLM's layers. What
vLLM takes for a LoRA adapter is a `TaskWeights`: a checkpoint's digest and one weight for each of its tasks.

    LoRARequest("loraf:<digest>:<set>") ─▶ manager: TaskWeights ─▶ weights: StepWeights ─▶ layers: y += delta

    extension    the worker extension
    manager      vLLM's LoRA managers: a task set becomes weights, a checkpoint becomes operands
    weights      the task weights of each row of a step's batch
    layers       vLLM's LoRA layers, with a delta in place of slots
    gpu          the memory that CUDA graphs read
    selfcheck    compares operands with ΔW
    compiling    keeps torch.compile on
"""
