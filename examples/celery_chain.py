"""A Celery app of another project that has one answer go into the next prompt.

It knows a broker, a backend, and the name of a task; a worker must be running beside them:
    python examples/celery_chain.py redis://:password@127.0.0.1:6379/0
"""

import sys

from celery import Celery, chain

if len(sys.argv) != 2:
    sys.exit("usage: celery_chain.py redis://:password@127.0.0.1:6379/0")
app = Celery("another-project", broker=sys.argv[1], backend=sys.argv[1])


def generate(prompt, **parameters):
    return app.signature("millrace.generate", kwargs={"prompt": prompt, "temperature": 0, **parameters})


draft = generate("def add(a, b):\n", max_tokens=24)
# What the task before this one said stands for {text}.
review = generate("# A test of this function:\n{text}\ndef test_add():\n", max_tokens=24)

result = chain(draft, review)()
answer = result.get(timeout=60)
print(result.parent.get()["text"])
print(answer["text"])
print(f"{answer['usage']['completion_tokens']} tokens, {answer['finish_reason']}")
