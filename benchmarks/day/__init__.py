"""A day in which everything goes wrong, in minutes: afterwards what was sent and not deleted is stored, once."""
