"""What the tests of the HTTP server send, and what they read in its replies."""

import base64

SAY = {"messages": [{"role": "user", "content": "a red star"}]}


def sent(path):
    return {"type": "image", "data": base64.b64encode(path.read_bytes()).decode()}


def captions(reply):
    assert reply.status_code == 200, reply.text
    return [hit["caption"] for hit in reply.json()["hits"]]
