"""What a distillation step costs: its parts timed (step, by instruments), how that grows with the
size of the work (sweep), and what a GPU does meanwhile (trace)."""
