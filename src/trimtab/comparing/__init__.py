"""What each way to adapt a host is worth on the user's own data: quality, cost, time, reach."""
