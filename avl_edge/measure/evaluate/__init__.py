"""Quality against memory: the same questions asked in many settings, their answers scored and counted."""

from .answers import Answer, AnswerLog, describe
from .attention import watch
from .attention_plot import draw_attention, require_plot
from .data import read_questions
from .divergence import Divergence
from .metrics import METRICS, check_questions, require_packages
from .plots import draw_plots, require_plots
from .questions import Question, Questions
from .report import report
from .run import Asked, EvaluationRun
from .settings import REFERENCE, Setting, settings_of

__all__ = [
    "METRICS",
    "REFERENCE",
    "Answer",
    "AnswerLog",
    "Asked",
    "Divergence",
    "EvaluationRun",
    "Question",
    "Questions",
    "Setting",
    "check_questions",
    "describe",
    "draw_attention",
    "draw_plots",
    "read_questions",
    "report",
    "require_packages",
    "require_plot",
    "require_plots",
    "settings_of",
    "watch",
]
