//! Starts the real services that tests run against.
