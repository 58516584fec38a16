"""Studies: which choice helps, where, by how much and at what cost, from one file, with honest statistics."""

from miras.study.config import Study, read_study, study_from

__all__ = ["Study", "read_study", "study_from"]
