"""vLLM's own OpenAI app, in the service's process, on the engine that a backend runs.

    app        vLLM's routes and serving classes, made for one backend
    serving    its subclasses of those classes: names, prompts and fingerprints come from the service
    client     the engine as they see it: every request runs through the backend, with its task set
    facts      what this relies on inside vLLM
    admitted   what the service has found out of a request before the app gets it

The service has admitted and validated a request, and holds its adapter, before the app sees it. So nothing here knows
adapters by name, permissions or limits. May import `engine`; it never imports this room.
"""
