"""Three machines with PostgreSQL, two nodes of tokenauth, and HAProxy, as docs/scaling.md shows them."""
