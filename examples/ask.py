"""Asks an OpenAI-compatible server about a picture; needs nothing but Python.

python ask.py http://tiny-shapes.default.svc:8000/v1 tiny-shapes shapes.png \
    "What is in the picture?"
"""

import base64
import json
import sys
import urllib.request
from pathlib import Path


def ask(base_url: str, model: str, picture: Path, question: str) -> dict:
    """Send one chat request with a picture; returns the response."""
    encoded = base64.b64encode(picture.read_bytes()).decode()
    body = {
        "model": model,
        "messages": [
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{encoded}"},
                    },
                    {"type": "text", "text": question},
                ],
            }
        ],
        "max_tokens": 32,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{base_url}/chat/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


if __name__ == "__main__":
    base_url, model, picture, question = sys.argv[1:]
    print(json.dumps(ask(base_url, model, Path(picture), question)))
