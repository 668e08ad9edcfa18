"""What a prompt of the programs task means, worked out from its words alone."""

INPUTS = {
    "number": [-9, -4, -1, 0, 1, 2, 3, 5, 8, 13],
    "list": [[3, 1, 2, 5], [7, 7, -2, 0], [-5, 4, 9, 1, 6], [8, 2, 6, 4, 3, 1], [0, -1, 10, 12]],
    "text": ["ab", "Zoo", "kitten", "a b c", "HeadRace"],
}
PLAIN = {
    "square": lambda x: x * x,
    "negate": lambda x: 0 - x,
    "abs": lambda x: max(x, 0 - x),
    "sum": sum,
    "max": lambda x: sorted(x)[-1],
    "min": lambda x: sorted(x)[0],
    "first": lambda x: x[-len(x)],
    "last": lambda x: x[len(x) - 1],
    "sort": sorted,
    "tail": lambda x: [one for place, one in enumerate(x) if place > 0],
    "upper": lambda x: "".join(one.upper() for one in x),
    "reverse": lambda x: "".join(reversed(x)) if isinstance(x, str) else list(reversed(x)),
    "double": lambda x: x + x,
    "length": lambda x: sum(1 for _ in x),
}
WITH_CONSTANT = {
    "add": lambda x, n: x + int(n),
    "minus": lambda x, n: x - int(n),
    "times": lambda x, n: x * int(n),
    "mod": lambda x, n: x - (x // int(n)) * int(n),
    "append": lambda x, c: f"{x}{c}",
    "prepend": lambda x, c: f"{c}{x}",
}


def meaning(prompt, value):
    """What the program that a prompt asks for answers to `value`."""
    _, *steps = prompt.removesuffix(">").split(", ")
    for step in steps:
        word, *constant = step.split()
        value = WITH_CONSTANT[word](value, *constant) if constant else PLAIN[word](value)
    return value


def expected_tests(prompt):
    """The tests of a prompt."""
    kind = prompt.split(",")[0]
    return [{"input": [one], "output": meaning(prompt, one)} for one in INPUTS[kind]]
