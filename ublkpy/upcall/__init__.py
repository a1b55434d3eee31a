"""Who answers what the map leaves to Python; all of it runs in the threads of the queues."""
