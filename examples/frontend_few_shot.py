"""Few-shot classification of many texts at once: they all begin with the same examples, which are computed once.

python examples/frontend_few_shot.py --url http://127.0.0.1:30000
"""

import sglang as sgl
from frontend import connect

EXAMPLES = (
    ("The hinge broke on the second day and nobody answered my letters.", "negative"),
    ("Arrived early, well packed, and it does exactly what the box says.", "positive"),
    ("It is a kettle. It boils water.", "neutral"),
    ("My daughter has not put it down since her birthday.", "positive"),
    ("The manual is in a language that I could not find out.", "negative"),
    ("Grey, as pictured. The cable is one metre long.", "neutral"),
)
TEXTS = (
    "I would buy it again at twice the price.",
    "The left one is louder than the right one, and both are too loud.",
    "Comes with two batteries.",
    "It stopped, I shook it, it went on. A month now.",
    "A gift for my neighbour, who is still my neighbour.",
    "The colour came off on my hands.",
    "Fits.",
    "Three of my friends have ordered one since.",
)
KINDS = ["positive", "negative", "neutral"]


@sgl.function
def classify(s, text):
    s += "Say of each review whether it is positive, negative or neutral.\n\n"
    for example, kind in EXAMPLES:
        s += f"Review: {example}\nKind: {kind}\n\n"
    s += f"Review: {text}\nKind: " + sgl.select("kind", choices=KINDS)


with connect(__doc__):
    for text, state in zip(TEXTS, classify.run_batch([{"text": text} for text in TEXTS]), strict=True):
        print(f"{state['kind']:10}{text}")
