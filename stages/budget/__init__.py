"""What widths cost and how a budget is spent on them."""
