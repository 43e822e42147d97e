"""The description of the HTTP, held against the routes and against what is answered."""
