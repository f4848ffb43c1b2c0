"""Parts that all operations share: choice of the backend, access to compiled code, checks of arguments."""
