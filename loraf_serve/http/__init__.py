"""OpenAI's API over HTTP, and a page: one more door into the service.

    door        listens, opens, stops: uvicorn, TLS; `connections`: none of them keeps others out
    gate        what every call passes: host, `origins`, route, token, body; request id and observers
    routes      every route there is
    answering   requests for answers: to vLLM's own app, or through the merged backend
    asked       a request's body → gRPC's messages, which validation reads; `chats`: of a chat; `fields`: each field
    mistakes    all that is wrong with a request, as one error
    relay       to vLLM's app and back
    models      the list of models, and what the page asks; `report`: scores and masks of an adapter
    exchange    one request and its answer, as ASGI passes them
    merged      answers of the merged backend in OpenAI's form
    errors      errors in OpenAI's form
    page        static files

The service admits, validates and observes requests of this door and of gRPC's alike; see `loraf_serve.service.doors`.
"""
