"""The questions of the lessons' Predict cells: choices, which one the result shows, and the reason.

A name is the lesson's number and the id of the cell that asks. The text of the question stands in that cell.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Question:
    """Choices of which `right` (an index) comes out, and why. Raises ValueError unless there are two or more."""

    choices: tuple[str, ...]
    right: int
    because: str

    def __post_init__(self) -> None:
        if len(self.choices) < 2 or not 0 <= self.right < len(self.choices):
            raise ValueError(f"two choices or more and the index of one of them, got {self.choices} and {self.right}")


QUESTIONS = {
    "00/same-seed-predict": Question(
        ("similar pictures", "the same to the last bit"),
        1,
        "All randomness is in the noise at the start, and the generator fixes it.",
    ),
    "00/network-sees-text": Question(
        ("noise", "a sharp sneaker", "a blurred average sneaker", "an average of all ten classes"),
        2,
        "The network knows the class and nothing else, so its best answer is the mean of all sneakers.",
    ),
    "00/passes-predict": Question(
        ("50 times", "51 times", "100 times"),
        2,
        "With guidance each step evaluates the network with the prompt and without it.",
    ),
    "00b/train-text": Question(
        ("yes, nearly", "no, it stays far above zero"),
        1,
        "Lines with different velocities pass through the same place, and no network can tell them apart there.",
    ),
    "00b/sample-text": Question(
        ("yes", "no, they bend"), 1, "The expectation sharpens on the way from noise to data, so its direction changes."
    ),
    "00b/guidance-predict": Question(
        ("they spread as before", "they gather, and move away from the other class"),
        1,
        "Guidance exaggerates what tells the class from the others, at the price of variety.",
    ),
    "00b/micro-text": Question(
        ("the shape", "the details"), 0, "The shape is the mean of a class, which is learned at high noise."
    ),
    "01/passes-predict": Question(
        ("50 steps without guidance", "30 steps with guidance", "both the same"),
        1,
        "30 guided steps are 60 passes, and each pass costs the same.",
    ),
    "01/inside-operators-text": Question(
        ("nearly all, in both", "about half, in both", "less than a tenth in a batch of 1"),
        1,
        "The rest of the time moves numbers through memory and starts small operators. It does no counted arithmetic.",
    ),
    "01/price-model-predict": Question(
        ("about 1.4", "about 2", "about 4"), 1, "Euler's method is of first order: half the step, about half the error."
    ),
    "02/order-predict": Question(
        ("2", "4", "8"), 1, "The error of order 2 falls with the square of the number of steps."
    ),
    "02/fair-predict": Question(
        ("Euler", "Heun", "Adams-Bashforth"),
        2,
        "It has order 2 like Heun's method and takes twice as many steps with the same number of evaluations.",
    ),
    "02/shift-exercise-text": Question(
        ("near noise", "near data"),
        1,
        "The modes are small against the noise, so the paths turn when little noise is left.",
    ),
    "02b/bias-text": Question(
        ("0", "about 0.5", "more"), 2, "A covariance of 64 numbers from 100 pictures is wrong in every direction."
    ),
    "02b/variety-predict": Question(
        ("precision", "recall", "both"), 1, "The pictures are as good as real ones, and nine kinds are missing."
    ),
    "02b/grain-text": Question(
        ("by about 1", "by about 10", "by about 100"), 0, "The features were trained to ignore what a blur takes away."
    ),
    "03/channels-solution": Question(
        ("1.4 times per bit; 2 bits", "2 times per bit; nearly 1 bit", "4 times per bit; 3 bits"),
        1,
        "A bit less doubles the step between two numbers, and the error is in proportion to the step.",
    ),
    "03/clip-text": Question(
        ("the largest value for both", "about a half for both", "about a half for INT8, a tenth or so for INT4"),
        2,
        "With few bits the steps are coarse, so finer steps for most inputs are worth the cut of the largest ones.",
    ),
    "03/policy-text": Question(
        (
            "the output projection, for both",
            "the output projection has the fewest; the input projection harms most",
            "the blocks harm most",
        ),
        1,
        "The input projection sees the raw latents, and its error reaches every block.",
    ),
    "03/formats-text": Question(
        ("nvfp4", "int4_weight_only", "w4a4"),
        1,
        "In four bits the inputs are the problem, and this format leaves the inputs as they are.",
    ),
    "03/quality-text": Question(
        ("nvfp4 and nvfp4_svdquant", "int4_weight_only and w4a8", "all of them"),
        1,
        "Their inputs have eight bits or more, and the intervals of their change in FD contain zero.",
    ),
    "03/svd-text": Question(
        ("a block", "modulation", "random numbers"),
        1,
        "Its singular values fall fastest, so a thin branch holds most of it.",
    ),
    "03/speed-text": Question(
        ("packed NVFP4 first", "float32 first", "real INT8 first, simulated and packed NVFP4 last"),
        2,
        "Only the real kernel multiplies integers. The other two round or decode first and then multiply in float.",
    ),
    "04/staircase-text": Question(
        ("a bent line with a useful slope", "steps; the derivative is 0 nearly everywhere"),
        1,
        "Between two jumps the rounded weight does not change, so neither does the loss.",
    ),
    "04/layer-predict": Question(
        ("0.00001 helps most", "0.0001 helps most", "0.003 helps most"),
        1,
        "The smallest rate moves no weight over a rounding threshold in time; the largest one disturbs all of them.",
    ),
    "04/rate-text": Question(
        ("yes, one rate serves both", "no, INT8 needs a larger rate", "no, INT8 needs a smaller rate"),
        2,
        "A training step disturbs the weights, which pays only while that is small beside the error of rounding.",
    ),
    "04/stored-text": Question(
        ("eight-bit formats gain most", "four-bit weights gain, eight bits hardly", "all gain about the same"),
        1,
        "At eight bits there is little error to win back.",
    ),
    "04/attention-text": Question(
        ("P is by far the worst", "k is by far the worst", "all four are of about one size"),
        2,
        "The four errors are nearly independent and of similar size, so their squares add.",
    ),
    "04/rules-text": Question(
        ("1, as in every softmax", "anything from far below 1 to far above"),
        1,
        "The log-sum-exp belongs to the rounded scores and the scores here are unrounded.",
    ),
    "04/attention-qat-text": Question(
        ("yes, the errors add", "no, their squares add", "no, the larger one hides the smaller"),
        1,
        "The two errors are nearly independent of each other.",
    ),
    "04/speed-text": Question(
        ("trained is faster", "packed is faster", "all are slower than float"),
        2,
        "Every rounding is extra work here, and the products are computed in float.",
    ),
    "05/watch-text": Question(
        ("about 5 % and 50 %", "about 0.5 % and 5 %", "about 30 % and 100 %"),
        0,
        "One step changes the picture's noise little; ten steps are a fifth of the whole walk.",
    ),
    "05/baseline-network-text": Question(
        ("ten Euler steps", "fifty steps of which ten are computed, by a wide margin", "neither by much"),
        2,
        "Walking along an old velocity is a longer step. Only the head and the tail of the network see the new time.",
    ),
    "05/rule-text": Question(
        (
            "TeaCache, and both beat even distances",
            "the table, and both beat even distances",
            "even distances are closest",
        ),
        2,
        "How much a residual changes is not how much an error at that step will matter in the end.",
    ),
    "05/guidance-text": Question(
        ("yes, a quarter", "a little less than a quarter", "nothing"),
        1,
        "The passes at both ends are always computed, and they are a larger part of what is left.",
    ),
    "06/frames-text": Question(
        ("under those tokens only", "everywhere, but nearly all of it under them", "everywhere, evenly"),
        1,
        "Every token attends to every other one, but most of the attention stays near.",
    ),
    "06/hand-text": Question(
        (
            "both, in both layers",
            "the active ones after layer 1, none after layer 2",
            "the active ones, in both layers",
        ),
        1,
        "In the second layer the active tokens attend to keys of the others, which are stale by then.",
    ),
    "06/cost-text": Question(
        ("about a quarter", "about a half", "no faster at all"),
        0,
        "At 1,024 tokens the arithmetic dominates. On small pictures a pass has a fixed price and the share is larger.",
    ),
    "06/stream-text": Question(
        ("yes, it doubles with each halving", "hardly", "no, it falls to zero"),
        1,
        "The cache compares with the same step of the frame before, so the number of steps does not matter to it.",
    ),
    "06/alarm-text": Question(
        ("both are right", "wrong without a probe; with one it is computed in full", "wrong in both cases"),
        1,
        "A probed token outside the named region moved more than the alarm level allows.",
    ),
    "06/plain-text": Question(
        ("better", "the same", "worse"),
        2,
        "In a plain generation every token changes at every step, so there is no region to leave out.",
    ),
    "07/mask-predict": Question(
        ("nothing", "two elements behind the data become 0", "the program stops with an error"),
        1,
        "Three tiles of 4 cover 12 elements, and a kernel has no notion of where an array ends.",
    ),
    "07/intensity-predict": Question(
        ("2", "4", "it stays"), 0, "Work grows with the area of the tile, loads with its sides."
    ),
    "08/smooth-solution": Question(
        ("in proportion", "it does not grow", "with the square"),
        1,
        "The bias is the mean over the tokens, and the mean is taken off before anything is rounded.",
    ),
    "08/two-level-text": Question(
        ("all of them, coarser", "hardly anything with one level, everything with two", "nothing with either"),
        1,
        "With one level the weights fall below the smallest scale. The second level is the tile's own largest weight.",
    ),
    "08/network-text": Question(
        ("the first", "the last", "it does not matter"),
        0,
        "In this network most of the error of FP4 comes from block 1.",
    ),
    "08/window-solution": Question(
        ("squares, and what is near", "rows, and what is predicted", "squares, and what is predicted"),
        1,
        "This network attends along rows, and nearness is a poor guess of what a token attends to.",
    ),
    "09/landing-exercise": Question(
        ("at a random mode", "at the nearest mode", "all at one point, the mean of the data"),
        2,
        "x - (x - E[x]) = E[x] for every noise.",
    ),
    "09/hop-text": Question(
        ("2 and 2", "4 and 2", "4 and 4"),
        1,
        "The bias of a straight hop is of second order, and the new part is the share of the hop in the jump.",
    ),
    "09/scratch-sample-text": Question(
        ("yes", "no"), 0, "Two Euler steps stop short of the modes. The student was trained to end at them."
    ),
    "09/image-text": Question(
        ("the shape", "the details"), 0, "The average of a class has its shape already; the details differ by noise."
    ),
    "10/modes-predict": Question(
        ("between the bumps, for both", "at one bump for reverse, between them for forward", "the other way round"),
        1,
        "The reverse divergence asks at the student's points only, the forward one at the truth's points.",
    ),
    "10/watch-text": Question(
        ("one after another", "all at once"),
        1,
        "The cloud first covers the whole ring, and contracts to it from there.",
    ),
    "10/watch-reading": Question(
        ("one update for one", "a twentieth of the rate", "never updated"),
        2,
        "A fake score that never learns goes on pushing points away from where the student was at the start.",
    ),
    "10/starved-predict": Question(
        ("12 % and 50 %", "50 % and 12 %", "50 % for both"),
        0,
        "Reverse KL weighs each of the student's points alike; forward KL weighs by the ratio of the densities.",
    ),
    "10/alarms-text": Question(
        ("lag gives all of them away", "lag gives a slow fake score away, distance also the other two", "neither does"),
        1,
        "With little noise or strong guidance the fake score knows the student well, but the student is wrong.",
    ),
    "10/table-text": Question(
        ("in front", "behind matching that starts from a student", "it never makes a picture"),
        1,
        "It first has to leave the mean of the data, which takes much of its time.",
    ),
    "11/count-text": Question(
        ("6 passes", "9 passes", "12 passes"),
        1,
        "A frozen network needs a gradient to its inputs only, one pass more for each of its passes: 3 + 4 + 2.",
    ),
    "11/count-reading": Question(
        ("all of them", "about two thirds", "none"),
        1,
        "The intervals of five other rows overlap with that of the best one; the rest lie behind it.",
    ),
    "11/held-back-text": Question(
        ("ode", "flow_map", "dmd2"),
        2,
        "At the small budgets dmd2 made a handful of its own updates, so its points show its start more than itself.",
    ),
    "11/large-text": Question(
        ("tens", "thousands, or tens of thousands at the published rate", "millions"),
        1,
        "The samples and the rate decide: the published rate is more than an order of magnitude below a tuned one.",
    ),
    "11/large-reading": Question(
        ("for all three", "for `learned` only", "for none, in this table"),
        2,
        "For consistency training the number shows in recall instead.",
    ),
    "11/number-reading": Question(
        ("no, its teacher knows bags", "yes"), 1, "The teacher is asked at places around tops only."
    ),
    "11/subset-reading": Question(
        ("its shape", "its brightness", "its class"), 1, "The garments keep their shapes and turn gray and flat."
    ),
    "12/drift-predict": Question(
        ("too large", "too small"), 1, "B runs on the machine after it has slowed down, so B looks slower than it is."
    ),
    "12/ladder-text": Question(
        ("about 10, and 20", "about 100, and a little more", "1,000 or more"),
        1,
        "100 passes become one; the pipeline around the network keeps INT8 from giving its full factor.",
    ),
    "12/multiply-text": Question(
        ("yes", "no, far less", "no, more"),
        1,
        "Both save passes, and a step that the solver does not take cannot be skipped.",
    ),
    "12/amdahl-text": Question(
        ("the same few percent", "several times as much, most for one picture", "nearly all"),
        1,
        "The network has become so cheap that the noise, the scheduler and the pictures begin to count.",
    ),
}
