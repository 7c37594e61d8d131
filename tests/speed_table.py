"""Rows of the speed table in docs/kv-reuse.md, as the tests of both engines use them."""

import random

from mezo.activation import activate
from mezo.objective import Example, Target, TokenSequence

INVOCATION = [7]
# Examples, options, common tokens, own tokens of a prompt, activated; and what is reused in percent, of an activated
# LoRA from the second epoch on. Answers have 3 tokens; a prompt's last token is computed in each row, which reads it.
TABLE = {
    "alora 397": ((16, 1, 0, 397, True), 100 * 396 / 400),
    "alora 1,500": ((16, 1, 0, 1500, True), 100 * 1499 / 1503),
    "alora 64 rows": ((64, 1, 0, 397, True), 100 * 396 / 400),
    "options": ((16, 4, 0, 200, False), 100 * (1 - 16 * (199 + 4 * 4) / (16 * 4 * 203))),
    "common": ((16, 1, 1500, 97, False), 100 * (1 - (1500 + 16 * 100) / (16 * 1600))),
}


def examples_of(row: str, vocabulary: int) -> list[Example]:
    """Random examples of a row, which differ from the first token on that is their own."""
    count, options, common, own, activated = TABLE[row][0]
    generator = random.Random(0)

    def ids(length: int) -> list[int]:
        return generator.choices(range(10, vocabulary), k=length)

    beginning, examples = ids(common), []
    for n in range(count):
        prompt = [*beginning, 10 + n % (vocabulary - 10), *ids(own - 2), *INVOCATION]
        answers = [[first, *ids(2)] for first in generator.sample(range(10, vocabulary), options)]
        targets = [tuple(Target(len(prompt) - 1 + i, t, o) for i, t in enumerate(a)) for o, a in enumerate(answers)]
        rows = [TokenSequence((*prompt, *a), t) for a, t in zip(answers, targets, strict=True)]
        examples.append(Example(tuple(rows), 0 if options > 1 else None))
    return activate(examples, INVOCATION) if activated else examples
