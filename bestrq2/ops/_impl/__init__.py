"""What the operations share: choice of the backend, access to compiled code, checks of arguments."""
