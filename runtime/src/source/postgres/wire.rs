//! The transport of a replication connection: start-up, SCRAM, simple queries, and the copy-both stream.
//!
//! `tokio-postgres` has no replication mode. Framing and SCRAM are `postgres-protocol`'s; what is here is the order of messages
//! (<https://www.postgresql.org/docs/current/protocol-flow.html>) and a read path that takes large pieces and hands out frames
//! without copying them: the walsender sends one small piece per message to a reader that is idle, and large ones to one that is not.

use std::{io, time::Duration};

use bytes::{Buf as _, BytesMut};
use fallible_iterator::FallibleIterator as _;
use meander_config::{Origin, PostgresSource};
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, SCRAM_SHA_256_PLUS, ScramSha256},
    },
    message::{
        backend::{AuthenticationSaslBody, ErrorFields, Message},
        frontend,
    },
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, ReadHalf, WriteHalf, split},
    time::timeout,
};

use crate::{
    position::Lsn,
    source::postgres::{
        pgoutput::unix_micros,
        preflight::{Credentials, must_bind},
        socket::{self, Socket, SocketError},
    },
};

/// How long connecting, signing in and each simple query may take.
const REQUEST_DEADLINE: Duration = Duration::from_secs(15);
/// How long a server that lives can be silent: it answers every status that asks for it, but not in the middle of a transaction that
/// it decodes without sending anything.
const LONGEST_SILENCE: Duration = Duration::from_secs(60);
/// Room for one read. Large, so that a busy walsender's pieces are taken whole.
const READ_SIZE: usize = 256 * 1024;
/// The largest message PostgreSQL sends: a tuple cannot be larger than 1 GiB, and its text can be twice that for bytea.
const MAX_FRAME: usize = (2 << 30) + 64 * 1024;

/// Why the connection cannot be used any more.
#[derive(Debug, thiserror::Error)]
pub enum WireError {
    /// There is no connection, or none that is as secure as asked.
    #[error("{0}")]
    Socket(#[from] SocketError),
    /// The network failed, or the server closed the connection.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// Nothing came within the deadline.
    #[error("no answer within {} s", .0.as_secs())]
    Timeout(Duration),
    /// The server refused, in its own words.
    #[error("{message} (SQLSTATE {code})")]
    Server {
        /// Five characters, see PostgreSQL's appendix A.
        code: String,
        /// The server's message, its detail and its hint.
        message: String,
    },
    /// The server asked for a way of signing in that is not supported.
    #[error("the server asks for {0} authentication, which is not supported; use scram-sha-256 in pg_hba.conf")]
    UnsupportedAuthentication(&'static str),
    /// The server signs in without SCRAM bound to the TLS session, which was asked for.
    #[error("the server does not prove that it knows the password")]
    Unbound,
    /// The server was shut down in good order: it has sent all that it had, and was told that all of it is safe.
    #[error("the server was shut down")]
    ShutDown,
    /// The server broke the protocol.
    #[error("protocol violation: {0}")]
    Protocol(String),
}

/// A signed-in connection in replication mode.
pub struct ReplicationConnection {
    stream: Socket,
    buffer: BytesMut,
    process: i32,
}

impl ReplicationConnection {
    /// Connects and signs in.
    ///
    /// # Errors
    /// When the server cannot be reached, is not as secure as asked, or refuses.
    pub async fn connect(source: &PostgresSource, credentials: &Credentials) -> Result<Self, WireError> {
        within_deadline(Self::connect_inner(source, credentials)).await
    }

    async fn connect_inner(source: &PostgresSource, credentials: &Credentials) -> Result<Self, WireError> {
        let server = source.server();
        let stream = socket::open(&server).await?;
        let mut connection = Self {
            stream,
            buffer: BytesMut::with_capacity(8 * 1024),
            process: 0,
        };
        let mut out = BytesMut::new();
        frontend::startup_message(
            [
                ("user", credentials.user.as_str()),
                ("database", source.database.as_str()),
                ("replication", "database"),
            ]
            .into_iter()
            .chain(SESSION_SETTINGS.iter().copied()),
            &mut out,
        )?;
        send(&mut connection.stream, &out).await?;
        connection.authenticate(credentials, must_bind(&server)).await?;
        loop {
            match connection.message().await? {
                Message::BackendKeyData(body) => connection.process = body.process_id(),
                Message::ReadyForQuery(_) => return Ok(connection),
                Message::ErrorResponse(body) => return Err(server_error(body.fields())),
                _ => {}
            }
        }
    }

    /// The server's process at the other end, which a slot names as the one that reads it.
    #[must_use]
    pub fn process(&self) -> i32 {
        self.process
    }

    async fn authenticate(&mut self, credentials: &Credentials, must_bind: bool) -> Result<(), WireError> {
        let mut scram: Option<ScramSha256> = None;
        let mut proven = !must_bind;
        loop {
            let mut out = BytesMut::new();
            match self.message().await? {
                Message::AuthenticationOk if proven => return Ok(()),
                Message::AuthenticationOk
                | Message::AuthenticationMd5Password(_)
                | Message::AuthenticationCleartextPassword
                    if must_bind =>
                {
                    return Err(WireError::Unbound);
                }
                Message::AuthenticationMd5Password(body) => {
                    let hash = md5_hash(
                        credentials.user.as_bytes(),
                        credentials.password.as_bytes(),
                        body.salt(),
                    );
                    frontend::password_message(hash.as_bytes(), &mut out)?;
                }
                Message::AuthenticationSasl(body) => {
                    let (mechanism, binding) = self.scram_mechanism(&body)?;
                    if must_bind && mechanism != SCRAM_SHA_256_PLUS {
                        return Err(WireError::Unbound);
                    }
                    let client = ScramSha256::new(credentials.password.as_bytes(), binding);
                    frontend::sasl_initial_response(mechanism, client.message(), &mut out)?;
                    scram = Some(client);
                }
                Message::AuthenticationSaslContinue(body) => {
                    let client = scram.as_mut().ok_or_else(|| unexpected("SASLContinue"))?;
                    client.update(body.data())?;
                    frontend::sasl_response(client.message(), &mut out)?;
                }
                Message::AuthenticationSaslFinal(body) => {
                    scram
                        .as_mut()
                        .ok_or_else(|| unexpected("SASLFinal"))?
                        .finish(body.data())?;
                    proven = true;
                }
                Message::AuthenticationCleartextPassword => {
                    return Err(WireError::UnsupportedAuthentication("clear-text password"));
                }
                Message::ErrorResponse(body) => return Err(server_error(body.fields())),
                Message::NoticeResponse(_) => {}
                _ => return Err(WireError::UnsupportedAuthentication("an unknown kind of")),
            }
            if !out.is_empty() {
                send(&mut self.stream, &out).await?;
            }
        }
    }

    /// Bound to the TLS session where both sides can. Where only this side can, it says so under the protection of the password, and
    /// a server that could as well, from which somebody in the middle hid it, refuses.
    fn scram_mechanism(&self, offered: &AuthenticationSaslBody) -> Result<(&'static str, ChannelBinding), WireError> {
        let offers = |wanted: &str| offered.mechanisms().any(|mechanism| Ok(mechanism == wanted));
        match self.stream.server_end_point() {
            Some(end_point) if offers(SCRAM_SHA_256_PLUS)? => {
                Ok((SCRAM_SHA_256_PLUS, ChannelBinding::tls_server_end_point(end_point)))
            }
            Some(_) if offers(SCRAM_SHA_256)? => Ok((SCRAM_SHA_256, ChannelBinding::unrequested())),
            None if offers(SCRAM_SHA_256)? => Ok((SCRAM_SHA_256, ChannelBinding::unsupported())),
            _ => Err(WireError::UnsupportedAuthentication("SASL other than SCRAM-SHA-256")),
        }
    }

    /// Runs one command and returns its rows as text.
    ///
    /// # Errors
    /// When the command fails, or is not answered within the deadline.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, WireError> {
        within_deadline(self.query_inner(sql)).await
    }

    async fn query_inner(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, WireError> {
        self.send_query(sql).await?;
        let mut rows = Vec::new();
        let mut error = None;
        loop {
            match self.message().await? {
                Message::DataRow(body) => {
                    let buffer = body.buffer();
                    rows.push(
                        body.ranges()
                            .map(|range| Ok(range.map(|range| String::from_utf8_lossy(&buffer[range]).into_owned())))
                            .collect()?,
                    );
                }
                Message::ErrorResponse(body) => error = Some(server_error(body.fields())),
                Message::ReadyForQuery(_) => return error.map_or(Ok(rows), Err),
                _ => {}
            }
        }
    }

    /// Starts logical replication where the slot's `confirmed_flush_lsn` stands.
    ///
    /// # Errors
    /// When the server refuses, above all with SQLSTATE 55006 while another owner holds the slot.
    pub async fn start_replication(
        self,
        slot: &str,
        publication: &str,
        origin: Origin,
    ) -> Result<(FrameReader, StatusWriter), WireError> {
        // 0/0 asks for the slot's own position: the server would silently skip ahead of ours anyway, so what the slot says is
        // compared with the checkpoint instead.
        let command = format!(
            "START_REPLICATION SLOT {} LOGICAL 0/0 (proto_version '1', publication_names {}, messages 'true'{})",
            quote_identifier(slot),
            // The option holds a list of identifiers inside a string literal.
            quote_literal(&quote_identifier(publication)),
            // Older versions do not know the option, and send all.
            match origin {
                Origin::Any => "",
                Origin::None => ", origin 'none'",
            },
        );
        self.copy_both(&command).await
    }

    /// Reads the server's WAL as it is, between two places.
    ///
    /// # Errors
    /// When the server refuses, above all because it does not have it any more.
    pub async fn read_wal(self, from: Lsn, to: Lsn) -> Result<Vec<u8>, WireError> {
        let length = usize::try_from(to.0.saturating_sub(from.0)).unwrap_or(usize::MAX);
        // The writing half stays open, and says nothing: this is over before the server asks.
        let (mut reader, _writer) = self
            .copy_both(&format!("START_REPLICATION PHYSICAL {from} TIMELINE 1"))
            .await?;
        within_deadline(async {
            let mut wal = Vec::new();
            while wal.len() < length {
                match reader.next_frame()? {
                    Some(Frame::Data { message, .. }) => wal.extend_from_slice(message),
                    Some(Frame::Keepalive { .. }) => {}
                    None => reader.fill().await?,
                }
            }
            wal.truncate(length);
            Ok(wal)
        })
        .await
    }

    /// Runs a command that begins a stream.
    async fn copy_both(mut self, command: &str) -> Result<(FrameReader, StatusWriter), WireError> {
        within_deadline(async {
            self.send_query(command).await?;
            loop {
                while self.buffer.len() < 5 {
                    self.fill().await?;
                }
                // CopyBothResponse, the one message that `postgres-protocol` does not know.
                if self.buffer[0] == b'W' {
                    let length = u32::from_be_bytes([self.buffer[1], self.buffer[2], self.buffer[3], self.buffer[4]]);
                    let length = length as usize + 1;
                    while self.buffer.len() < length {
                        self.fill().await?;
                    }
                    self.buffer.advance(length);
                    return Ok(());
                }
                if let Message::ErrorResponse(body) = self.message().await? {
                    return Err(server_error(body.fields()));
                }
            }
        })
        .await?;
        let (read, write) = split(self.stream);
        Ok((
            FrameReader {
                read,
                end: self.buffer.len(),
                buffer: self.buffer.to_vec(),
                last: 0,
                start: 0,
                silence: LONGEST_SILENCE,
            },
            StatusWriter { write },
        ))
    }

    async fn send_query(&mut self, sql: &str) -> Result<(), WireError> {
        let mut out = BytesMut::new();
        frontend::query(sql, &mut out)?;
        send(&mut self.stream, &out).await
    }

    async fn message(&mut self) -> Result<Message, WireError> {
        loop {
            if let Some(message) = Message::parse(&mut self.buffer)? {
                return Ok(message);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> Result<(), WireError> {
        match self.stream.read_buf(&mut self.buffer).await? {
            0 => Err(closed()),
            _ => Ok(()),
        }
    }
}

/// Settings that change how values are printed, and how soon a silent peer loses the slot. The same for every connection, so
/// that what is streamed and what is queried look alike whatever the role or the database are set to.
pub const SESSION_SETTINGS: &[(&str, &str)] = &[
    ("application_name", "meander"),
    ("client_encoding", "UTF8"),
    ("DateStyle", "ISO, MDY"),
    ("IntervalStyle", "postgres"),
    ("TimeZone", "UTC"),
    ("extra_float_digits", "3"),
    ("bytea_output", "hex"),
    ("lc_monetary", "C"),
    // Names of tables, functions and types as values (regclass and its kin) are qualified unless they are built in.
    ("search_path", "pg_catalog"),
    ("quote_all_identifiers", "off"),
    // Creating a slot waits for every older transaction, and so does a change of a publication for its tables' locks.
    ("lock_timeout", "10s"),
    // Nothing that the role is set to ends a connection which waits for work, or for a sink.
    ("statement_timeout", "0"),
    ("idle_in_transaction_session_timeout", "0"),
    ("idle_session_timeout", "0"),
    // What is changed here is seen by this server alone; a standby that is gone must not hold it up.
    ("synchronous_commit", "local"),
    ("wal_sender_timeout", "10s"),
];

/// One message of the stream.
#[derive(Debug)]
pub enum Frame<'a> {
    /// A message of the output plugin.
    Data {
        /// The server's position.
        wal_end: Lsn,
        /// The server's clock when it sent the message, in microseconds since the Unix epoch.
        sent_micros: i64,
        /// The message.
        message: &'a [u8],
    },
    /// The server's position: everything committed before `wal_end` was sent.
    Keepalive {
        /// The server's position.
        wal_end: Lsn,
        /// The server waits for a status.
        reply_requested: bool,
    },
}

/// The reading half of the stream.
pub struct FrameReader {
    read: ReadHalf<Socket>,
    buffer: Vec<u8>,
    /// Where the last message began.
    last: usize,
    start: usize,
    end: usize,
    silence: Duration,
}

impl FrameReader {
    /// Waits for more bytes. Cancel safe.
    ///
    /// # Errors
    /// When the connection ends, or the server is silent for longer than it can be while it is alive: it answers the status that
    /// [`StatusWriter`] sends.
    pub async fn fill(&mut self) -> Result<(), WireError> {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.buffer.len() - self.end < READ_SIZE / 2 {
            self.buffer.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
        if self.buffer.len() - self.end < READ_SIZE / 2 {
            self.buffer.resize(self.end + READ_SIZE, 0);
        } else if self.end == 0 && self.buffer.len() > 8 * READ_SIZE {
            // One huge row must not hold its memory for ever.
            self.buffer = vec![0; READ_SIZE];
        }
        match timeout(self.silence, self.read.read(&mut self.buffer[self.end..])).await {
            Err(_) => Err(WireError::Timeout(self.silence)),
            Ok(Err(error)) => Err(error.into()),
            Ok(Ok(0)) => Err(closed()),
            Ok(Ok(count)) => {
                self.end += count;
                Ok(())
            }
        }
    }

    /// Has the last message come out once more. To be called before the next [`fill`](Self::fill).
    pub fn put_back(&mut self) {
        self.start = self.last;
    }

    /// The next whole message that has been read, or `None` when [`fill`](Self::fill) is needed first.
    ///
    /// # Errors
    /// When the server ends the stream or breaks the protocol.
    pub fn next_frame(&mut self) -> Result<Option<Frame<'_>>, WireError> {
        loop {
            let bytes = &self.buffer[self.start..self.end];
            let Some((&[tag, l0, l1, l2, l3], _)) = bytes.split_first_chunk::<5>() else {
                return Ok(None);
            };
            let length = u32::from_be_bytes([l0, l1, l2, l3]) as usize;
            if !(4..=MAX_FRAME).contains(&length) {
                return Err(WireError::Protocol(format!(
                    "message {:?} of {length} bytes",
                    char::from(tag)
                )));
            }
            if bytes.len() < length + 1 {
                return Ok(None);
            }
            let from = self.start;
            self.last = from;
            self.start += length + 1;
            match tag {
                b'd' => return copy_data(&self.buffer[from + 5..self.start]).map(Some),
                b'E' => {
                    // The same parser as everywhere else; an error is rare, so copying is fine.
                    return Err(
                        match Message::parse(&mut BytesMut::from(&self.buffer[from..self.start]))? {
                            Some(Message::ErrorResponse(body)) => server_error(body.fields()),
                            _ => unexpected("ErrorResponse"),
                        },
                    );
                }
                b'c' => return Err(WireError::Protocol("the server ended the stream".to_owned())),
                b'C' => return Err(WireError::ShutDown),
                // NoticeResponse and ParameterStatus may come at any time.
                b'N' | b'S' => {}
                other => {
                    return Err(WireError::Protocol(format!(
                        "unexpected message {:?}",
                        char::from(other)
                    )));
                }
            }
        }
    }
}

fn copy_data(body: &[u8]) -> Result<Frame<'_>, WireError> {
    match body.split_first() {
        // XLogData: start, end and clock of the server, 8 bytes each, come before the plugin's message.
        Some((b'w', rest)) if rest.len() >= 24 => Ok(Frame::Data {
            wal_end: lsn_at(rest, 8),
            sent_micros: unix_micros(u64_at(rest, 16)),
            message: &rest[24..],
        }),
        // Keepalive: end and clock of the server, and whether it waits for a reply.
        Some((b'k', rest)) if rest.len() >= 17 => Ok(Frame::Keepalive {
            wal_end: lsn_at(rest, 0),
            reply_requested: rest[16] == 1,
        }),
        _ => Err(WireError::Protocol("unknown replication message".to_owned())),
    }
}

/// The LSN at an offset that the caller has checked.
fn lsn_at(bytes: &[u8], offset: usize) -> Lsn {
    Lsn(u64_at(bytes, offset))
}

fn u64_at(bytes: &[u8], offset: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[offset..offset + 8]);
    u64::from_be_bytes(value)
}

/// The writing half of the stream.
pub struct StatusWriter {
    write: WriteHalf<Socket>,
}

impl StatusWriter {
    /// Tells the server what was received and what is durable.
    ///
    /// `flushed` is what lets the server forget WAL: [`Lsn::ZERO`] acknowledges nothing.
    ///
    /// # Errors
    /// When the connection is gone.
    pub async fn send(&mut self, received: Lsn, flushed: Lsn, reply: bool) -> Result<(), WireError> {
        let mut message = [0; 39];
        message[0] = b'd';
        message[1..5].copy_from_slice(&38_u32.to_be_bytes());
        message[5] = b'r';
        message[6..14].copy_from_slice(&received.0.to_be_bytes());
        message[14..22].copy_from_slice(&flushed.0.to_be_bytes());
        message[22..30].copy_from_slice(&flushed.0.to_be_bytes());
        // The client's clock is for display only.
        message[38] = u8::from(reply);
        within_deadline(send(&mut self.write, &message)).await
    }
}

/// Without the flush, TLS could keep a part.
async fn send(stream: &mut (impl AsyncWrite + Unpin), bytes: &[u8]) -> Result<(), WireError> {
    stream.write_all(bytes).await?;
    Ok(stream.flush().await?)
}

async fn within_deadline<T>(work: impl Future<Output = Result<T, WireError>>) -> Result<T, WireError> {
    timeout(REQUEST_DEADLINE, work)
        .await
        .unwrap_or(Err(WireError::Timeout(REQUEST_DEADLINE)))
}

fn closed() -> WireError {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the server closed the connection").into()
}

fn unexpected(what: &str) -> WireError {
    WireError::Protocol(format!("unexpected {what}"))
}

fn server_error(mut fields: ErrorFields<'_>) -> WireError {
    let (mut code, mut message) = (String::new(), String::new());
    while let Ok(Some(field)) = fields.next() {
        let value = String::from_utf8_lossy(field.value_bytes());
        match field.type_() {
            b'C' => code = value.into_owned(),
            b'M' => message.insert_str(0, &value),
            b'D' | b'H' => {
                message.push_str("; ");
                message.push_str(&value);
            }
            _ => {}
        }
    }
    WireError::Server { code, message }
}

/// Quotes an identifier for SQL and for the replication grammar.
#[must_use]
pub fn quote_identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// Quotes a string literal for the replication grammar.
#[must_use]
pub fn quote_literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_keepalive_says_the_servers_position_and_whether_it_waits() {
        let mut body = vec![b'k'];
        body.extend(0x16B_3748_u64.to_be_bytes());
        body.extend([0; 8]);
        body.push(1);
        assert!(matches!(
            copy_data(&body).unwrap(),
            Frame::Keepalive {
                wal_end: Lsn(0x16B_3748),
                reply_requested: true
            }
        ));
    }

    #[test]
    fn a_cut_or_unknown_replication_message_is_an_error() {
        for body in [&b""[..], b"k", b"w", b"w12345678", b"?"] {
            assert!(copy_data(body).is_err(), "{body:?}");
        }
    }

    #[test]
    fn names_are_quoted_as_sql_wants_them() {
        assert_eq!(quote_identifier(r#"a"b"#), r#""a""b""#);
        assert_eq!(quote_literal(&quote_identifier("o'x")), r#"'"o''x"'"#);
    }
}
