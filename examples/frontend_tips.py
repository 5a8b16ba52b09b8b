"""Short tips, each written out by a branch of its own: the branches run at once and share what came before them.

python examples/frontend_tips.py --url http://127.0.0.1:30000
"""

import sglang as sgl
from frontend import connect

TIPS = ("Eat a balanced diet.", "Exercise regularly.", "Sleep enough.", "Drink water.")


@sgl.function
def advise(s):
    s += sgl.system("You advise people who sit at a desk all day. You are kind, brief and concrete.")
    s += sgl.user(
        "How does one stay healthy? Give me four tips, then tell me more of each, and sum them up at the end."
    )
    s += sgl.assistant_begin()
    s += "Here are four tips: " + " ".join(f"{number}. {tip}" for number, tip in enumerate(TIPS, 1)) + "\n\n"
    s.sync()  # fork sends what there is so far ahead of the branches, and waits for none of it
    branches = s.fork(len(TIPS))
    for number, (branch, tip) in enumerate(zip(branches, TIPS, strict=True), 1):
        branch += f"More of tip {number}, {tip[:-1].lower()}:" + sgl.gen("more", max_tokens=32, stop="\n")
    for number, branch in enumerate(branches, 1):
        s += f"{number}.{branch['more']}\n"
    s += "In short:" + sgl.gen("summary", max_tokens=32, stop="\n")
    s += sgl.assistant_end()


with connect(__doc__):
    state = advise.run(temperature=0)
    print(state.text())
