"""What samples say: intervals, limits, figures, requirements and verdicts."""
