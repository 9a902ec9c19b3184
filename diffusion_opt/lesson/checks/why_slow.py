"""Exercises of lesson 01."""

from diffusion_opt.lesson.checks.answers import Answer, called, compare, praise


def ex_01_1(answer: Answer) -> None:
    """attention_macs(num_tokens, width): multiply-accumulates of one self-attention layer."""
    n, d = 50, 256
    found = called(answer, (n, d))
    if found is None:
        return
    projection, product = n * d * d, n * n * d
    mistakes = (
        (2 * product, "the projections are missing: queries, keys, values and output, each n d d"),
        (4 * projection, "the attention itself is missing: scores n n d, and the values they gather, n n d"),
        (3 * projection + 2 * product, "the output projection is missing: there are four, not three"),
        (4 * projection + product, "the scores gather the values: a second product of n n d"),
        (
            2 * (4 * projection + 2 * product),
            "these are FLOPs: one MAC is a multiplication with its addition, two FLOPs",
        ),
    )
    compare(found, 4 * projection + 2 * product, mistakes)
    praise(answer, f"attention overtakes its projections where n = 2 d, here at {2 * d} tokens")


def ex_01_2(answer: Answer) -> None:
    """amdahl(share, factor): speed-up of the whole if `share` of the time becomes `factor` times faster."""
    share, factor = 0.7, 4.0
    found = called(answer, (share, factor))
    if found is None:
        return
    mistakes = (
        ((1 - share) + share / factor, "this is the new time; the speed-up is the old time, 1, over it"),
        (factor, "only a share of the time got faster; the rest is as slow as before"),
        (1 / (1 - share), "this is the limit for an endless factor; the fast part still takes share / factor"),
        (1 + share * (factor - 1), "speed-ups do not average: times add, so add up the new times and divide"),
    )
    compare(found, 1 / ((1 - share) + share / factor), mistakes)
    praise(answer, "what is left untouched sets the limit, 1 / (1 - share)")
