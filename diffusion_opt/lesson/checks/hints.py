"""Hints for every exercise, given one at a time: `checks.hint("05_2")`.

A stub says "not yet" and nothing else, because a hint that stands under an exercise is read before the exercise is
tried. A reader who is stuck asks for the first hint, which names the idea, then for the next. The last one comes close
to the formula; the whole solution is folded in the notebook.
"""

from collections.abc import Mapping

HINTS = {
    "00_1": (
        "There are two equations and two unknowns, x and e. Which of them is easy to solve for e?",
        "Put e = x + v into the equation of x_t. Then look at the shapes: t holds one time per picture.",
    ),
    "00b_1": (
        "Make all pairs of a place and a point first: x_t[:, None] and points, (b, n, d). Which noise belongs to each?",
        "A softmax over the points turns the exponents into weights. Then average e - x with them.",
    ),
    "00b_2": (
        "Evaluate the network twice: with `classes` and with `classes.drop()`.",
        "Start from the velocity without the class, and go `scale` times the way to the one with it.",
    ),
    "01_1": (
        "A product of an (n, k) matrix with a (k, m) matrix costs n k m MACs. How many such products has the layer?",
        "Four of them are (n, d) times (d, d). Two more have n x n scores on one side.",
    ),
    "01_2": (
        "Let the old time be 1. How long does each of the two parts take afterwards?",
        "One part keeps its time, the other one is divided by the factor. A speed-up is old time over new time.",
    ),
    "02_1": (
        "Two evaluations per step: one where the step begins, and one where it would end.",
        "Walk an Euler step, evaluate the velocity there at time r, go back, and walk with the mean of both.",
    ),
    "02_2": (
        "The loop has to remember two things from the step before. Which ones does the formula name?",
        "Keep the velocity and the length of the step before; in the first step there are none, so it is Euler's.",
    ),
    "02_3": (
        "Use the slider above on both sides of 1 and read the error in its title.",
        "The modes are narrow, so the paths turn near the data. A shift below 1 puts more steps there.",
    ),
    "02b_1": (
        "Three parts: the squared distance of the means, both traces, and twice the sum of the roots, taken off.",
        "R from the eigenvalues and eigenvectors of cov2; then the eigenvalues of R cov1 R, their roots, the sum.",
    ),
    "02b_2": (
        "First the radius of each ball: distances within `by`, sorted. Which neighbor of a point is the point itself?",
        "Then compare the distances from `points` to `by` with the radii: inside any of the balls counts.",
    ),
    "03_1": (
        "One scale per row: which dimension of the weight does the largest size run over?",
        "Scale a row so that its largest size meets the largest integer, round, and undo the scale.",
    ),
    "03_2": (
        "Count three things for the whole matrix: the codes, the scales, the branch.",
        "How many blocks are there? The branch has rank x (rows + columns) numbers. Divide by the number of weights.",
    ),
    "03_3": (
        "The sizes are per input channel: which dimension of the weight and of x is that?",
        "Compute s from the two largest sizes and alpha as in the formula. Which of the two is multiplied by it?",
    ),
    "04_1": (
        "Which function of torch is constant outside of a range and has gradient 1 inside?",
        "Clamp first. Then add what rounding changes, in a way that passes no gradient (detach).",
    ),
    "04_2": (
        "The result is one number for the whole batch: a sum of squares over a sum of squares.",
        "The teacher's output is a constant for the gradient, so compute it under torch.no_grad().",
    ),
    "04_3": (
        "In two's complement the low four bits of a code are the code. How are the other bits removed?",
        "Mask with & 15, take even and odd columns, and shift one of them by four bits.",
    ),
    "05_1": (
        "At which times does the cached walk evaluate the model? Euler has to evaluate at these and no others.",
        "Each computed step starts at such a time. One more time is needed, because the walk has an end.",
    ),
    "05_2": (
        "Two points (time, value) define a straight line. Take the last two and read it at time t.",
        "To the newest value add its change per unit of time, times the time from the newest point to t.",
    ),
    "05_3": (
        "Walk along the changes with a running sum. When is a step skipped, and what happens to the sum otherwise?",
        "The first and the last step are True whatever the sum says; the list is one longer than the changes.",
    ),
    "06_1": (
        "First count the numbers in one slot: what is kept for a token in a layer?",
        "A key and a value of `width` numbers each. Then multiply by bytes, contexts and steps, and divide by 1e9.",
    ),
    "06_2": (
        "The result at a place depends on a square around it. Which operation of a network looks at squares?",
        "The largest value in a window of 2 ring + 1, with a padding that keeps the size (max pooling).",
    ),
    "06_3": (
        "Two sources: inside the region the walk's own tokens, outside the given picture. At which time is the latter?",
        "Noise the given picture to time r, then choose by the region; (n,) has to become (n, 1).",
    ),
    "07_1": (
        "Which elements of the tile do not exist, and what must they hold so that exp of them adds nothing?",
        "Load with other=-inf, subtract the maximum, exponentiate, divide by the sum, and store with the mask.",
    ),
    "07_2": (
        "Both parts were computed relative to their own maximum. Which maximum has the union?",
        "What was summed under the smaller maximum has to shrink by the exponential of the difference.",
    ),
    "07_3": (
        "FLOP over bytes: the FLOP stand in the text, the bytes in `kernel_bytes`.",
        "Queries and result move once; keys and values move once per tile of queries.",
    ),
    "08_1": (
        "Over which dimension of (batch, heads, tokens, channels) is the mean?",
        "Every score of a query loses scale times q . mean, and so does its log-sum-exp.",
    ),
    "08_2": (
        "First the gradient that arrives at the rounded weights, through the product with the values.",
        "The rounding passes it on unchanged. Then the gradient of a softmax: which P stands in it?",
    ),
    "08_3": (
        "Compute where each row's window begins, as a column of numbers, and compare with the places of the keys.",
        "i - width // 2, clamped so that the window stays inside; mind a width above the number of tiles.",
    ),
    "09_1": (
        "The step has length 1 and the velocity at t = 1 is given above the exercise. What is left of x?",
        "It ends at the mean of the data. The mean of a mixture is a weighted sum of its means.",
    ),
    "09_2": (
        "The jump has two parts, the hop from t to s and the rest from s to r. Where does the rest begin?",
        "Mean velocities add up by their times, so weight each part by its length and divide by the whole length.",
    ),
    "09_3": (
        "A loss of nearly zero is not a good sign here: what if the target equals the student's own output?",
        "Compare one pass with four. Who is good in short jumps only? Who stops short of the modes?",
    ),
    "10_1": (
        "Write x_phi - x_T with the two velocities; x_t cancels.",
        "Divide by the mean size of x - x_T of each picture. Mind the shapes of t and of this mean.",
    ),
    "10_2": (
        "What does a fake score need so that it keeps up with the student?",
        "Compare the three fields with the run that is `sound`: which one is off by a factor of forty?",
    ),
    "10_3": (
        "torch.func.grad turns a function of a number into its derivative. Apply it twice.",
        "vmap applies the second derivative to each ratio.",
    ),
    "11_1": (
        "Two kinds of turns. Count one turn of each; where gradient flows a pass costs three.",
        "The student's turn asks two networks without gradient. A turn of the fake score first makes a picture.",
    ),
    "11_2": (
        "Take logarithms of both lists: then it is the least-squares line.",
        "Slope = covariance over variance, the line goes through both means; at the end undo the logarithm.",
    ),
    "11_3": (
        "How many seconds does one picture save?",
        "Divide the training by the saving, round up, and treat a saving of zero or less first.",
    ),
    "12_1": (
        "Read what was refused above: which property of the network's weights did the pipeline defend?",
        "What was calibrated or searched belongs to one run. Which technique was, and which other one changes the run?",
    ),
    "12_2": (
        "Write the seconds before and after. Which part is the same in both?",
        "Seconds are overhead + MACs / rate; the speed-up is before over after.",
    ),
    "12_3": (
        "The teacher's 100 passes have to become 5 or fewer. How many passes has a guided step?",
        "A solver with very few steps reaches it alone, and a cache can help. Fewer bits do not save MACs.",
    ),
}


class Hints:
    """Gives the hints of an exercise one after the other; what was given is remembered by this instance alone."""

    def __init__(self, hints: Mapping[str, tuple[str, ...]]) -> None:
        self._hints, self._given = hints, dict.fromkeys(hints, 0)

    def __call__(self, exercise: str) -> None:
        """Print the next hint of `exercise`, such as "05_2". Raises ValueError for an exercise that does not exist."""
        name = exercise.removeprefix("ex_")
        if name not in self._hints:
            raise ValueError(f"there is no exercise {exercise!r}; there are {', '.join(self._hints)}")
        hints = self._hints[name]
        number = self._given[name] = min(self._given[name] + 1, len(hints))
        rest = len(hints) - number
        more = f"{rest} more" if rest else "the last one; the solution is folded below"
        print(f"hint {number} of {len(hints)}: {hints[number - 1]} ({more})")


hint = Hints(HINTS)
