"""Fair sharing of concurrent work, memory and computed values among owners, such as API clients."""
