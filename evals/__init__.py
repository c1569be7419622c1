"""Other evaluations than asking POPE's questions, and scores of answers that exist already."""
