"""Training recipes: parse -> data -> trainer -> train -> push."""
