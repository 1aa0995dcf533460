"""Alignment scores, fairness numbers, intervals, attainable optima.  Numpy; scipy where named."""
