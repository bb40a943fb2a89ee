"""One stage on several ranks: processes that compute parts of each forward, applied to the plain model from outside."""
