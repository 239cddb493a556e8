"""The interface of a backend, and the backends that need no vLLM.

`backend` is the interface; `loraf_serve.choose_backend` selects an implementation. `fallback` replaces a backend that
fails its self-check. `merged` adds a task set to the weights of a transformers model (`merged_weights`) in a thread
where sets take turns (`merged_engine`, `model_runner`); `answer_state` samples and detokenizes one answer, and
`output_queue` carries it to the service. `vocabulary` says which token ids a model can hold. Backends know neither gRPC
nor the registry of adapters.
"""
