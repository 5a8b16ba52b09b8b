r"""JSON from texts, held to a form by a regular expression; the instruction before the texts is computed once.

    python examples/frontend_json.py --url http://127.0.0.1:30000

The server needs a grammar backend: SGLang's default, xgrammar, on a GPU; on a machine without one start it with
``--grammar-backend llguidance`` (xgrammar has no kernel for the CPU in SGLang 0.5.23).
"""

import json

import sglang as sgl
from frontend import connect

INSTRUCTION = """\
From each notice in a harbour's book, take the ship's name, its kind, its length in metres and whether it carries cargo.
Kinds are ferry, tanker, trawler and yacht. Write JSON with the keys name, kind, length_m and cargo, and nothing else.

Notice: The ferry Aurora, 128 m, came in at noon with the mail and 40 containers.
{"name": "Aurora", "kind": "ferry", "length_m": 128, "cargo": true}

"""
NOTICES = (
    "The yacht Petrel, 14 m, moored at the east pier for the night.",
    "Tanker Salamis, 183 m, fully laden, waits in the roads for high water.",
    "Trawler Ingrid, 32 m, back with herring.",
    "The ferry Nordlys, 96 m, empty, went to the yard for paint.",
)
FORM = (
    r'\{"name": "[A-Z][a-z]{1,15}", "kind": "(ferry|tanker|trawler|yacht)", '
    r'"length_m": [1-9][0-9]{0,2}, "cargo": (true|false)\}'
)


@sgl.function
def extract(s, notice):
    s += INSTRUCTION
    s += f"Notice: {notice}\n" + sgl.gen("json", max_tokens=64, regex=FORM)


with connect(__doc__):
    for state in extract.run_batch([{"notice": notice} for notice in NOTICES], temperature=0):
        if state.error() is not None:
            raise SystemExit(f"The server refused: {state.error()}")
        print(json.loads(state["json"]))
