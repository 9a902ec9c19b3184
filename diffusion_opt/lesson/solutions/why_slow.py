"""Solutions of lesson 01."""


def attention_macs(num_tokens, width):
    projections = 4 * num_tokens * width * width  # queries, keys, values, output
    scores = num_tokens * num_tokens * width  # every query with every key
    values = num_tokens * num_tokens * width  # every query gathers every value
    return projections + scores + values


def amdahl(share, factor):
    return 1 / ((1 - share) + share / factor)


SOLUTIONS = {
    "ex_01_1": attention_macs,
    "ex_01_2": amdahl,
}
