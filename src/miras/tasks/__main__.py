"""`python -m miras.tasks` fetches the one data set that no Python package carries, the genome of `DNA`."""

from miras.tasks.dna import fetch

print(fetch())
