"""Which of the teacher's classes each of the student's classes is.

Shape shorthand: R RoIs, Ks and Kt foreground classes of student and teacher (background is the last
column), M <= Ks student classes that have a teacher class.
"""

from typing import Dict, List, Optional, Sequence, Tuple, Union

import torch

MASKED = -1
Name = Union[str, int]


class ClassMap:
    """From the student's classes to the teacher's, for predictions that are compared class by
    class."""

    def __init__(self, teacher_classes: Sequence[int], num_teacher_classes: int):
        """
        Args:
            teacher_classes: for each student class the teacher's, or ``MASKED`` for none.
            num_teacher_classes: Kt.
        """
        self.teacher_classes = tuple(teacher_classes)
        self.num_classes, self.num_teacher_classes = len(self.teacher_classes), num_teacher_classes
        self._student = [i for i, t in enumerate(self.teacher_classes) if t != MASKED]
        self._teacher = [self.teacher_classes[i] for i in self._student]
        #: Student and teacher have the same classes in the same order.
        self.is_identity = (
            self._teacher == list(range(self.num_classes)) == list(range(num_teacher_classes))
        )
        self._indices: Dict[Tuple[str, torch.device], torch.Tensor] = {}

    @property
    def masked(self) -> List[int]:
        """The student classes without a teacher class."""
        return [i for i, t in enumerate(self.teacher_classes) if t == MASKED]

    def teacher_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """(R, Kt + 1) -> (R, M + 1): the probability of the unmapped classes goes to background."""
        if self.is_identity:
            return logits
        unmapped = sorted(set(range(self.num_teacher_classes)) - set(self._teacher))
        rest = self._index("rest", [*unmapped, self.num_teacher_classes], logits)
        background = logits.index_select(1, rest).logsumexp(dim=1, keepdim=True)
        return torch.cat([self.teacher_channels(logits), background], dim=1)

    def student_logits(self, logits: torch.Tensor) -> torch.Tensor:
        """(R, Ks + 1) -> (R, M + 1): masked classes are left out."""
        if not self.masked:
            return logits
        columns = self._index("student+1", [*self._student, self.num_classes], logits)
        return logits.index_select(1, columns)

    def teacher_channels(self, x: torch.Tensor) -> torch.Tensor:
        """(R, Kt, ...) -> (R, M, ...); one channel (class-agnostic) stays as it is."""
        return self._select("teacher", self._teacher, x)

    def student_channels(self, x: torch.Tensor) -> torch.Tensor:
        """(R, Ks, ...) -> (R, M, ...); one channel (class-agnostic) stays as it is."""
        return self._select("student", self._student, x)

    def teacher_deltas(self, deltas: torch.Tensor) -> torch.Tensor:
        """(R, 4Kt) -> (R, 4M); (R, 4) stays as it is."""
        return self.teacher_channels(deltas.unflatten(1, (-1, 4))).flatten(1)

    def student_deltas(self, deltas: torch.Tensor) -> torch.Tensor:
        """(R, 4Ks) -> (R, 4M); (R, 4) stays as it is."""
        return self.student_channels(deltas.unflatten(1, (-1, 4))).flatten(1)

    def to_teacher(self, classes: torch.Tensor) -> torch.Tensor:
        """Student class indices (R,), background Ks allowed, as the teacher's; ``MASKED`` where
        there is none."""
        table = [*self.teacher_classes, self.num_teacher_classes]
        return self._index("to_teacher", table, classes)[classes]

    def to_column(self, classes: torch.Tensor) -> torch.Tensor:
        """Student class indices (R,), background Ks allowed, as columns of :meth:`student_logits`;
        masked classes are background."""
        table = [len(self._student)] * (self.num_classes + 1)
        for column, ours in enumerate(self._student):
            table[ours] = column
        return self._index("to_column", table, classes)[classes]

    def to_student(self, classes: torch.Tensor) -> torch.Tensor:
        """Teacher class indices (R,), background Kt allowed, as the student's; unmapped classes are
        background."""
        table = [self.num_classes] * (self.num_teacher_classes + 1)
        for ours, theirs in zip(self._student, self._teacher):
            table[theirs] = ours
        return self._index("to_student", table, classes)[classes]

    def _select(self, key: str, channels: List[int], x: torch.Tensor) -> torch.Tensor:
        if self.is_identity or x.shape[1] == 1:
            return x
        return x.index_select(1, self._index(key, channels, x))

    def _index(self, key: str, values: List[int], like: torch.Tensor) -> torch.Tensor:
        # Kept: making a tensor on a GPU from a list waits for it.
        index = self._indices.get((key, like.device))
        if index is None:
            index = self._indices[key, like.device] = torch.tensor(values, device=like.device)
        return index


def parse(setting: Sequence) -> Tuple[str, List[Tuple[Name, Name]]]:
    """Read ``TEACHER.CLASS_MAP``.

    Returns:
        "index", "teacher", "names" or "pairs", and the (student class, teacher class) pairs.

    Raises:
        ValueError: if it is none of the possible forms.
    """
    words = [x for x in setting if isinstance(x, str)]
    pairs = [tuple(x) for x in setting if not isinstance(x, str) and isinstance(x, Sequence)]
    is_fine = (
        len(words) + len(pairs) == len(setting)
        and words in ([], ["teacher"], ["names"])
        and not (words == ["teacher"] and pairs)
        and all(
            len(p) == 2 and all(isinstance(n, (str, int)) and not isinstance(n, bool) for n in p)
            for p in pairs
        )
    )
    if not is_fine:
        raise ValueError(
            f"{tuple(setting)}; possible: () for the same classes in the same order, ('teacher',) "
            "for a teacher of other classes, ('names',) for equal names, or pairs such as "
            "('tv', 'television'), alone or after 'names'; ('tv', '') means no such class"
        )
    return (words or ["pairs" if pairs else "index"])[0], pairs


def resolve(
    setting: Sequence,
    *,
    num_classes: Tuple[int, int],
    names: Tuple[Optional[Sequence[str]], Optional[Sequence[str]]],
    needed_by: str = "",
) -> Optional[ClassMap]:
    """The map that ``TEACHER.CLASS_MAP`` means, None for a teacher of other classes, which one with
    known, different names is too.

    Args:
        setting: the config's value.
        num_classes: Ks and Kt.
        names: the class names of student and teacher, None where they aren't known.
        needed_by: what compares predictions class by class, "" if nothing does.

    Raises:
        ValueError: if no map can be made of it.
    """
    mode, pairs = parse(setting)
    if mode == "teacher":
        if needed_by:
            raise ValueError(
                f"('teacher',) means that the classes have nothing in common, but {needed_by} "
                "compares them; give ('names',) or pairs"
            )
        return None
    if mode == "index":
        return _same_order(num_classes, names, needed_by)
    table: Dict[int, int] = {}
    if mode == "names":
        for i, name in enumerate(_known(names[0], "the student's")):
            if name in _known(names[1], "the teacher's"):
                table[i] = list(names[1]).index(name)
    seen = set()
    for ours, theirs in pairs:
        i = _find(ours, names[0], num_classes[0], "student")
        if i in seen:
            raise ValueError(f"student class {ours!r} stands in two pairs")
        seen.add(i)
        table[i] = MASKED
        if theirs != "":
            table[i] = _find(theirs, names[1], num_classes[1], "teacher")
    missing = [i for i in range(num_classes[0]) if i not in table]
    if missing:
        shown = ", ".join(repr(names[0][i]) if names[0] else str(i) for i in missing[:8])
        raise ValueError(
            f"{len(missing)} of {num_classes[0]} student classes have no teacher class: {shown}; "
            "add pairs (student class, teacher class), or (student class, '') to leave one out"
        )
    used = [t for t in table.values() if t != MASKED]
    twice = [t for t in used if used.count(t) > 1]
    if twice:
        name = names[1][twice[0]] if names[1] else twice[0]
        raise ValueError(f"teacher class {name!r} stands for two student classes")
    if not used:
        raise ValueError("no student class has a teacher class")
    return ClassMap([table[i] for i in range(num_classes[0])], num_classes[1])


def _same_order(num_classes, names, needed_by: str) -> Optional[ClassMap]:
    ours, theirs = num_classes
    if ours != theirs:
        others = (
            f"('names',) or pairs: {needed_by} compares class by class"
            if needed_by
            else "('teacher',) if its classes are others (cross-head predictions are in them), "
            "('names',) or pairs"
        )
        raise ValueError(f"the student has {ours} classes and the teacher {theirs}; give {others}")
    if names[0] and names[1] and list(names[0]) != list(names[1]):
        if not needed_by:
            return None
        i = next(i for i, (a, b) in enumerate(zip(*names)) if a != b)
        raise ValueError(
            f"{needed_by} compares class by class, but class {i} is {names[0][i]!r} for the "
            f"student and {names[1][i]!r} for the teacher; give ('names',) or pairs"
        )
    return ClassMap(range(ours), theirs)


def _known(names: Optional[Sequence[str]], whose: str) -> Sequence[str]:
    if not names:
        raise ValueError(
            f"{whose} class names are not known: its DATASETS.TRAIN and TEST name no "
            "registered data set with a name for each class; give pairs of class indices"
        )
    return names


def _find(name: Name, names: Optional[Sequence[str]], count: int, whose: str) -> int:
    if isinstance(name, int):
        if not 0 <= name < count:
            raise ValueError(f"the {whose} has no class {name}, only 0 to {count - 1}")
        return name
    if name not in _known(names, f"the {whose}'s"):
        raise ValueError(f"the {whose} has no class {name!r}; it has {', '.join(names or ())}")
    return list(names or ()).index(name)


def reads_names(setting: Sequence) -> bool:
    """Whether the setting can only be understood with the names of classes."""
    mode, pairs = parse(setting)
    return mode == "names" or any(isinstance(n, str) and n for pair in pairs for n in pair)
