"""`loraf-serve check`: what a start would find out before it answers, and what it would take, without a start.

    command   checks everything and prints the result
    report    the result, as text and as JSON
    memory    what each backend takes, and what is free
    http      what the HTTP door needs of this installation
    sizes     bytes of a model and of adapters, from their headers and manifests

Starts no engine, loads no weights, and leaves no process behind. `loraf_serve.cli` parses the options.
"""
