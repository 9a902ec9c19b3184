"""Guesses before a result, and what to say to them afterwards: `predict("05/watch-text")`, later `compare` with it.

A lesson's **Predict** asks a question whose answer the next cell shows. In a learner's copy (`tools/course.py`) a cell
under the question takes the guess, and a cell under the result comments it. A guess is made with the buttons or as an
argument, `predict("05/watch-text", "a")`. Questions are data (`questions.py`); what was guessed is kept by one
instance, so a new kernel starts afresh. A number of guesses that were right is told at each comparison, because being
surprised by half of the results is a good reason to go on.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import ipywidgets as widgets

from diffusion_opt.lesson.predictions.questions import QUESTIONS, Question

__all__ = ["QUESTIONS", "Predictions", "Question", "compare", "predict"]


@dataclass
class Predictions:
    """Takes guesses and comments them; `guesses` holds the index of the choice for each question that was answered."""

    questions: Mapping[str, Question]

    def __post_init__(self) -> None:
        self.guesses: dict[str, int] = {}
        self._compared: set[str] = set()

    def predict(self, name: str, guess: str | None = None) -> widgets.RadioButtons | None:
        """Buttons for the choices of a question, or nothing if `guess` ("a", "b", …) is given.

        Raises ValueError for a question or a guess that does not exist.
        """
        question = self._question(name)
        if guess is not None:
            letters = "abcdefgh"[: len(question.choices)]
            if guess not in tuple(letters):
                raise ValueError(f"a guess is one of {', '.join(letters)}, got {guess!r}")
            self.guesses[name] = letters.index(guess)
            return None
        options = [(choice, index) for index, choice in enumerate(question.choices)]
        buttons = widgets.RadioButtons(options=options, value=self.guesses.get(name), layout={"width": "max-content"})
        buttons.observe(lambda change: self.guesses.update({name: change["new"]}), names="value")
        return buttons

    def compare(self, name: str) -> None:
        """Print the guess beside the result and why it is so."""
        question = self._question(name)
        if name not in self.guesses:
            print(f"no guess yet. {question.because}")
            return
        self._compared.add(name)
        guess = self.guesses[name]
        verdict = "as you guessed" if guess == question.right else f"you guessed: {question.choices[guess]}"
        print(f"{question.choices[question.right]} ({verdict}). {question.because}")
        right = sum(self.guesses[other] == self.questions[other].right for other in self._compared)
        print(f"{right} of {len(self._compared)} guesses in this session were right")

    def _question(self, name: str) -> Question:
        if name not in self.questions:
            lesson = name.partition("/")[0]
            near = [other for other in self.questions if other.startswith(f"{lesson}/")] or list(self.questions)
            raise ValueError(f"there is no question {name!r}; there are {', '.join(near)}")
        return self.questions[name]


_session = Predictions(QUESTIONS)
predict, compare = _session.predict, _session.compare
