"""The resident backend inside vLLM's processes: one adapter for every task set.

A checkpoint's A and B stand once in each worker, as one operand of `loraf_serve.kernels` for each of vLLM's layers.
What vLLM takes for a LoRA adapter is a row: a checkpoint's digest and one weight for each of its tasks.

    LoRARequest("loraf:<digest>:<set>") ─▶ manager: a row ─▶ rows: the rows of each step ─▶ layers: y += delta(x, rows)

    extension    what is put in the place of vLLM's parts, and the backend's remote calls
    manager      requests become rows; checkpoints become operands
    rows         which rows of a step's batch an adapter acts on
    layers       vLLM's LoRA layers, with a delta in the place of slots
    parts        which part of a module's A and B a worker's layer holds
    gpu          what CUDA graphs may see of all this
    selfcheck    operands against ΔW
    compiling    keeps torch.compile on
"""
