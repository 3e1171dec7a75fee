"""Measurements: how fast, how late, how idle ``rt`` is, with other systems beside it in the same run.

May live here: nothing; ``bench.__main__`` is the command line. What is measured and how stands at the top of each file:
``measure``, ``loop_lag``, ``idle``, ``imports``. A number printed here is a measurement, never a test.
"""
