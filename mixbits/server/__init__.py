"""An OpenAI-compatible server of one packed model.

From the outside in:

    http        connections: their number, their time limits, signals and the end of the process
    access      who may ask: Host, Origin, API key
    app         the endpoints: bodies, answers, streams, clients that leave
    requests    what a body may ask for; everything else is refused by name
    prompts     text and messages as token ids, within the model's positions
    answers     the shapes of OpenAI's answers
    worker      the queue: one generation after the other
    generation  a sequence of the model, token by token
    texts       tokens as text that can be sent, and stop strings
    jobs        what passes between them

The first four know nothing of torch, the last four nothing of HTTP.
"""
