"""Solutions of lesson 00."""


def clean_prediction(x_t, v, t):
    t = t.reshape(-1, 1, 1, 1)  # one time per picture, ready to multiply (B, C, H, W)
    return x_t - t * v


SOLUTIONS = {
    "ex_00_1": clean_prediction,
}
