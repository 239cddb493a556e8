"""Validates one request: from a gRPC message to a GenerationRequest, or to a list of every invalid field.

    validation  goes through a request and calls the others, in one of two `lanes`
    prompts     the prompt as token ids; a `chat` through the model's template
    selection   adapter and task set; `names`: both as one name
    sampling    ranges and defaults; structured_output: the form of the answer
    json_text   JSON inside a text field

A new request field is read and checked here; its limits stand in `loraf_serve.limits`.
"""
