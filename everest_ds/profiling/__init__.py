"""What a run costs in compute, memory and time: predicted, counted or measured, never mixed."""
