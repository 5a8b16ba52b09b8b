"""Tree of thought: several plans by fork, each judged and worked out; the best one's answer is given.

python examples/frontend_tree_of_thought.py --url http://127.0.0.1:30000
"""

import sglang as sgl
from frontend import connect

TASK = (
    "A farmer has 24 metres of fence and a straight river. He wants a rectangular meadow at the river, which needs no "
    "fence on that side. How long and how wide should it be, so that it is as large as possible?"
)
PLANS = 3
GRADES = ["1", "2", "3", "4", "5"]


@sgl.function
def solve(s):
    s += sgl.system("You solve problems step by step. You first make a plan, then carry it out.")
    s += sgl.user(TASK)
    s.sync()  # fork sends what there is so far ahead of the branches, and waits for none of it
    plans = s.fork(PLANS)  # all share the task
    for number, plan in enumerate(plans, 1):
        plan += sgl.user(f"Write plan number {number} in two sentences. Do not solve the problem yet.")
        plan += sgl.assistant(sgl.gen("plan", max_tokens=40, temperature=0.7))
    answers = []
    for plan in plans:
        plan.sync()
        judge, worker = plan.fork(2)  # both share the task and the plan
        judge += sgl.user("How good is this plan, from 1 (bad) to 5 (good)?")
        judge += sgl.assistant(sgl.select("grade", choices=GRADES))
        worker += sgl.user("Carry the plan out and give the answer.")
        worker += sgl.assistant(sgl.gen("answer", max_tokens=48))
        answers.append((plan, judge, worker))
    best = max(answers, key=lambda one: int(one[1]["grade"]))
    s["grades"] = [int(judge["grade"]) for _, judge, _ in answers]
    s["plan"], s["answer"] = best[0]["plan"], best[2]["answer"]


with connect(__doc__):
    state = solve.run(temperature=0)
    print(f"grades of the {PLANS} plans: {state['grades']}\n\nthe best: {state['plan']}\n\nanswer: {state['answer']}")
