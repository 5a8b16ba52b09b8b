"""A chat of four turns, streamed: every turn's prompt is all that was said before, and the server has it cached.

python examples/frontend_chat.py --url http://127.0.0.1:30000
"""

import sglang as sgl
from frontend import connect

SYSTEM = "You are a helpful assistant in a museum of the sea. Answer in two or three short sentences."
QUESTIONS = (
    "What is the largest animal in the sea?",
    "What does it eat?",
    "How deep can it dive?",
    "And how does it sleep?",
)


@sgl.function
def chat(s, questions):
    s += sgl.system(SYSTEM)
    for number, question in enumerate(questions):
        s += sgl.user(question)
        s += sgl.assistant(sgl.gen(f"answer{number}", max_tokens=40))


with connect(__doc__):
    state = chat.run(questions=QUESTIONS, temperature=0, stream=True)
    for number, question in enumerate(QUESTIONS):
        print(f"\nyou> {question}")
        for piece in state.text_iter(f"answer{number}"):
            print(piece, end="", flush=True)
        print(f"\n  {state.get_meta_info(f'answer{number}')['cached_tokens']} tokens were cached")
