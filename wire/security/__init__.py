"""TLS, certificates, tokens and enrolment messages."""
