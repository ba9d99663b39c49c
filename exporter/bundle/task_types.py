"""What a task type is: one table, for the exporter, for what feeds engines, and for training.

The names are PEFT's; it has none for classifying images, and none for a torch module that the caller brought.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MODULE = "MODULE"


@dataclass(frozen=True)
class TaskType:
    """A kind of task.

    ``classes`` are the endings by which transformers calls its model classes for it, ``auto_class`` the one that
    chooses among them. ``outputs`` are the graph's. ``classifies`` says that outputs are classes, with labels;
    ``brings_head`` that the adapter brings the head, in a size of its own; ``models_language`` that outputs are over
    the vocabulary, by an embedding that may be the input's. A row of a ``decodes`` task must end with its last token,
    for the next one is predicted from there.
    """

    name: str
    classes: tuple[str, ...]
    auto_class: str
    outputs: tuple[str, ...] = ("logits",)
    classifies: bool = False
    brings_head: bool = False
    models_language: bool = False
    decodes: bool = False


TASK_TYPES: Mapping[str, TaskType] = {
    kind.name: kind
    for kind in (
        TaskType(
            "SEQ_CLS",
            ("ForSequenceClassification",),
            "AutoModelForSequenceClassification",
            classifies=True,
            brings_head=True,
        ),
        TaskType(
            "TOKEN_CLS",
            ("ForTokenClassification",),
            "AutoModelForTokenClassification",
            classifies=True,
            brings_head=True,
        ),
        TaskType(
            "QUESTION_ANS",
            ("ForQuestionAnswering",),
            "AutoModelForQuestionAnswering",
            outputs=("start_logits", "end_logits"),
            brings_head=True,
        ),
        TaskType(
            "CAUSAL_LM",
            ("ForCausalLM", "LMHeadModel"),
            "AutoModelForCausalLM",
            models_language=True,
            decodes=True,
        ),
        TaskType(
            "SEQ_2_SEQ_LM",
            ("ForConditionalGeneration", "EncoderDecoderModel"),
            "AutoModelForSeq2SeqLM",
            models_language=True,
        ),
        TaskType(
            "IMAGE_CLS",
            ("ForImageClassification",),
            "AutoModelForImageClassification",
            classifies=True,
            brings_head=True,
        ),
        TaskType("FEATURE_EXTRACTION", (), "AutoModel", outputs=("last_hidden_state",)),
    )
}
_OTHER = TaskType("", (), "")  # a module's, or one that a later version knows


def task_type(name: str) -> TaskType:
    """The kind of that name; one with nothing particular where the name is not in the table."""
    return TASK_TYPES.get(name, _OTHER)
